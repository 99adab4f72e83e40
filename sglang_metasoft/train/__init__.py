"""Training of a compressor: texts -> cases -> prepared contexts -> soft tokens -> a folder that the server loads."""
