"""Messages of released versions of the wire format, and the values that they stand for."""
