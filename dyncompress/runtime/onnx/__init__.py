"""One ONNX file whose exits and gates really skip work, checked in onnxruntime before it is put in place.

Imports passes and runtime.predict.
A layer that onnxruntime wants in another form is a case in `layer_forms.py`.
"""
