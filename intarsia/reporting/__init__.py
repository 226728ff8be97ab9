"""Reports and model cards: the puzzle picture, charts, and the page about one run or several."""
