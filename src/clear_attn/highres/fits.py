def check_fits(pipe, plan):
    return
