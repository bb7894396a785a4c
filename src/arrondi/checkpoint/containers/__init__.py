"""Containers: names, metadata and bytes of files, and the writer that lays them out beforehand."""
