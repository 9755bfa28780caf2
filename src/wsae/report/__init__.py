"""Reports: one self-contained HTML page per run, and its key figure as a picture. Reads run directories only."""
