"""fibecfed: Fisher-ordered curriculum federated fine-tuning of language models with LoRA, on fibecfed_kernels."""
