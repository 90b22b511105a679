"""Programs as users of transformers 4 wrote them; `test_programs.py` runs each with both libraries.

Their `main` takes the path of a checkpoint, the inputs as NumPy arrays, and a folder to save to, and returns numbers.
"""
