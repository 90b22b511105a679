"""What training a language model needs around the model, in NumPy alone.

| question | file |
|---|---|
| Where does a text come from, and which part is held out? | `corpus.py` |
| How do lines become rows and batches, and many texts few rows? | `packing.py` |
| Which tokens are predicted, and which are hidden? | `masking.py` |
| How good are the predictions, and what would a count table reach? | `evaluation.py` |
| What does the card of the trained model say? | `model_card.py` |
"""
