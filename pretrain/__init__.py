"""Models, kernels, the DeepSpeed engine and the training loop. May import `configs` and `data_pipeline`.

Start at `train.py`: it is the loop. `engine.py` is the only file that imports deepspeed; the models in `models/` are
plain modules that know nothing of it.
"""
