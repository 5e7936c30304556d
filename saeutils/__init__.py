"""saeutils: sparse autoencoders, from activations to evidence.

One file, one job; users import the module they need:

    from saeutils import datasets, plots
    from saeutils.training import TrainConfig, train

Nothing is imported here, so that `import saeutils` stays cheap.
"""

__version__ = "0.1.0"
