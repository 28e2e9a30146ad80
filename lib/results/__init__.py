"""What a run leaves: report, plots, cards, ONNX files. May import lib.inputs and what stands below it."""
