"""Reads WebDataset tar files of other tools: img2dataset, CLIP_benchmark, open_clip, FLAIR.

The headers and captions of a tar file are read first (`scan`), without its photos. Its photos are then streamed in
sequence with the webdataset library (`stream`). Only photos, `.txt` and `.json` are ever read; nothing is unpickled.
"""
