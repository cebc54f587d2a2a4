"""The native kernels: finding, loading and registering them. Without any, the references in qlora_lab/ops run."""
