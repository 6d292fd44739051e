"""Models and servers whose MoE layers are replaced by dispatched ones."""
