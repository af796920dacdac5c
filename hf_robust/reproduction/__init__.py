"""The published tables as data, the commands that reproduce a row of them, and what such a run found."""
