"""The stages of a compression: from a prompt's lengths to the entries of a layer."""
