"""What SGLang's cache holds of a request: rows, slots, the radix tree and the index of compressed prefixes."""
