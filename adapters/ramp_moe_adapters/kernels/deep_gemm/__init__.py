"""DeepGEMM (deepseek-ai/DeepGEMM): two persistent grouped GEMMs for Hopper."""
