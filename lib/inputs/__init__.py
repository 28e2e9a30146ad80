"""What teacher and student are fed: BM25, encoders, captions, graph, match features, rows. May import
common.py and what stands below it."""
