"""The verbs as functions: each composes the stages of one command and returns its result. Nothing here prints."""
