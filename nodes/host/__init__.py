"""The only place that knows ComfyUI: its folders, its memory, its progress bar, its server, its models.

Where ComfyUI is absent the same calls work on one folder, named by SDXL_LORA_HOME: results go into it, and `input/`,
`datasets/`, `models/`, `user/` and `temp/` lie in it.
"""
