"""What `isthmus plan` needs: what training and generation cost over a link, predicted from measured speeds.

It may import `isthmus.edge` and what is below, and no benchmark.
"""
