package bad

import "os"

var _, _ = os.ReadFile("tests may")
