"""What a run leaves: report, plots, ONNX files. May import lib.inputs and what stands below it."""
