"""Qwen-Image from an empty file: the library that the reader of the notebooks has at the end.

    from minqwen.pipeline import QwenImagePipeline      # prompt and pictures in, picture out

One file, one idea; README.md lists them in reading order. Nothing is imported here, so that a chapter which needs
one file loads one file.
"""

__version__ = "0.1.0"
