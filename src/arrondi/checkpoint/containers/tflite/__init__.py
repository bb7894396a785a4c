"""A TFLite (LiteRT) file, seen as a model directory: `flat` reads flatbuffers, `header` the model in them, `view` puts it together."""
