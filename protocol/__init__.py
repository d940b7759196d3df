"""What crosses the strip, without any I/O: messages, codecs, keys, the handshake and the sealed session."""
