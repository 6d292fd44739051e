"""Alpha-MoE (Aleph-Alpha/Alpha-MoE): both projections in one fused fp8 kernel for Hopper."""
