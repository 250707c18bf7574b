"""The HTML page of a run: one file with everything in it, made of reports alone.

``history.py`` is what the training process imports; all that draws is imported by the process that
makes the page (``python -m onnxport.page FOLDER``).
"""
