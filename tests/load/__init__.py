"""Does a server hold, for hours, under clients that come, go, stall, send garbage and half requests?"""
