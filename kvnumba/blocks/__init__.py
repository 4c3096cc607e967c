"""Which sequence holds which blocks: integers only."""
