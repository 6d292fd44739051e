"""FlashInfer's CUTLASS path: fused grouped GEMMs with a choice of tactics."""
