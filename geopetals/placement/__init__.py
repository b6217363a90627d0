"""Which server holds which blocks. One module for each method; all keep pinned servers and limits per server."""
