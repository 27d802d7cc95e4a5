package trust

import (
	"context"
	"time"

	"timonel/state"
)

// founding is the record of the cluster's beginning.
type founding struct {
	At time.Time `json:"at"`
}

// Found records once when the cluster was founded, and makes the token that came
// with its secrets good until 24 hours after that. The leader calls it in each
// term; for a cluster of before there were tokens, at is long ago and that token
// is good for nothing any more.
func (r *Registry) Found(ctx context.Context, at time.Time, bootstrapSecret string) error {
	return r.change(ctx, func(view state.View, now time.Time) (*state.Txn, error) {
		if _, found := view.Get(foundingKey); found {
			return nil, nil
		}
		at := at.UTC().Truncate(time.Second)
		txn := putNew(foundingKey, founding{At: at}, time.Time{})
		if expires := at.Add(DefaultTokenTTL); bootstrapSecret != "" && now.Before(expires) {
			token := Token{
				ID: BootstrapToken, Hash: hashSecret(bootstrapSecret), Created: at, Expires: expires,
				Description: "came with the cluster's secrets", By: "founding",
			}
			txn.Conditions = append(txn.Conditions, state.Condition{Key: tokenPrefix + BootstrapToken})
			txn.Changes = append(txn.Changes, put(tokenPrefix+BootstrapToken, token, expires))
		}
		return txn, nil
	})
}

// Founded is when the cluster was founded; zero while that is not recorded.
func (r *Registry) Founded() time.Time {
	f, _, _, _ := get[founding](r.state.Store().View(), foundingKey) // zero if it cannot be read
	return f.At
}
