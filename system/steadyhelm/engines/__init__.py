"""Engine servers: vLLM and SGLang as processes of their own, spoken to over HTTP and never imported."""
