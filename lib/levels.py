"""The five levels, the texts of a pin, whose an input is: what common.py has that needs no PyTorch."""

LEVELS = {5: "excellent", 4: "good", 3: "complementary", 2: "poor", 1: "highly irrelevant"}
NUM_LEVELS = len(LEVELS)
THRESHOLDS = (3, 4, 5)  # paper: AUROC of label >= 3, 4, 5
RELEVANT = 4  # a pin of this level or above is relevant

# The six text sources of the paper in the order they are read. Each is a column of features/pins.parquet.
FIELDS = ("title", "description", "caption", "queries", "boards", "links")
OUTPUTS = ("probabilities", "expected_level")  # of the student as ONNX; no input has such a name
CHARACTERS = 100  # of a token at most: what stands farther back in a text is not read, not tokenized either


def at_least(p, level):
    """Probabilities [B, C], an array or a tensor -> P(label >= level) [B]."""
    return p[:, level - 1 :].sum(1)


def expected_level(p):
    """Probabilities [B, C], an array or a tensor -> expected level [B], to rank by."""
    levels = range(1, NUM_LEVELS + 1)
    return sum(level * p[:, level - 1] for level in levels)


def side_of(name):
    """'query' or 'pin': what an embedding or category belongs to."""
    return name.split("_")[0]
