"""Tools in front of training: manifests, audio reading, transcripts and demo speech."""
