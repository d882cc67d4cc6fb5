"""Fused Triton kernels, the only place that imports triton. Installed as `remoe_adapt.triton_kernels`."""
