"""Messages that a receiver must refuse, each kept as a file, and the script that writes them."""
