"""Series in, reports out: a DICOM listener and a folder watcher around one report pipeline, with a journal on disk."""
