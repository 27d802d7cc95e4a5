package hostile

import "os"

var _, _ = os.ReadFile("the one package may")
