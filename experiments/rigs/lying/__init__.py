"""A cloud that lies about what it computes, and the measurement of whether an audit catches it."""
