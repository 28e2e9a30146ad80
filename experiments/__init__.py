"""The paper's findings, peers, comparisons of runs. May import everything: nothing stands above it."""
