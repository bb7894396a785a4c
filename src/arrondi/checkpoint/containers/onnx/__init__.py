"""An ONNX file, seen as a model directory: `wire` and `header` read it, `weights` finds what is quantized, `view` puts it together."""
