"""Captions, photos and knowledge to a folder of shards; and new knowledge into shards that exist.

The plan is a pure function of the inputs. Each shard's plan has a hash of what goes in: the samples in their order,
size and time of each image file, how it is resized. Next to the shards, ``.plan/`` keeps one small file per finished
shard with that hash, so a second run writes only shards that are missing, of the wrong size, or planned differently.
Nothing appears under its final name before it is complete, and the manifest is written last.

A part of the plan can be written by itself, on another machine, while others write theirs. What a part writes depends
only on the plan, so parts needn't wait for each other, and two that write the same shard write the same bytes.
"""
