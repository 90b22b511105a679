"""What training needs around the model, for every task, in NumPy alone.

| question | file |
|---|---|
| Where does a text come from, and which part is held out? | `corpus.py` |
| How do lines become rows and batches, and many texts few rows? | `packing.py` |
| Which tokens are predicted, and which are hidden? | `masking.py` |
| How are the examples of a task read, and what columns does it need? | `records.py` |
| How does an example become a row, or rows, of a model? | `features.py`, `windows.py` |
| Which rows share a batch, in what order, and how does a run go on? | `batches.py` |
| How good are the predictions, and what would a count table reach? | `evaluation.py` |
| What does the card of the trained model say? | `model_card.py` |
"""
