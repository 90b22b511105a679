"""Training, the same in every backend: what is done at which step, and what a run leaves on disk. In NumPy alone.

| question | file |
|---|---|
| How do weights follow gradients, and how fast at which step? | `recipe.py` |
| How is a batch shared out among devices, and what does each share count? | `shares.py` |
| What is the state of a run, and how does it start, stop and go on, in the same framework or in another? | `state.py` |
| What can be set, and in which file? | `settings.py` |
| What does each task read, and how are its predictions measured? | `tasks.py`, `metrics.py`, `baselines.py` |
| How do files become batches? | `examples.py` |
| In which order is it all done? | `loop.py` |
| What does a run tell while it goes on? | `log.py` |
| How are gradients made and applied? | `pt/training.py`, `tf/training.py`, `flax/training.py`, which read alike |
"""
