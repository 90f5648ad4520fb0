"""Converts captions, photos and knowledge into a folder of shards, and replaces the knowledge in existing shards.

The plan is a pure function of the inputs. The plan of each shard has a hash of its inputs: the samples in order, the
size and modification time of each image file, and how it is resized. `.plan/`, next to the shards, keeps one small
file (sidecar) with that hash per finished shard. A second run therefore writes only shards that are missing, have the
wrong size, or are planned differently. A file gets its final name only when it is complete, and the manifest is written
last.

Several machines can each write a part of the plan at the same time. What a part writes depends only on the plan, so
parts do not wait for each other, and two parts that write the same shard write the same bytes.
"""
