"""The only package that imports ComfyUI: its folders, memory management, progress bar, server and models.

Outside ComfyUI the same functions use one folder, SDXL_LORA_HOME: results are written to it, and it contains `input/`,
`datasets/`, `models/`, `user/` and `temp/`.
"""
