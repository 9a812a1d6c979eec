"""What both transports call: decode, tokenize, queue, score, answer."""
