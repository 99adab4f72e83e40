"""What kept entries are to count for beyond their own attention: that of dropped ones."""
