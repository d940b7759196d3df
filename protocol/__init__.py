"""The wire, without any I/O: messages, codecs, keys, the handshake and the sealed session."""
