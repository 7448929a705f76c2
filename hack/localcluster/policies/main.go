// Command policies enforces the NetworkPolicies of a cluster on one node, by the controller of kube-router.
// Built and run by hack/localcluster only. Beside kube-router's own command it routes nothing, serves no
// Services, and says when the rules of the first sync are in place.
package main

import (
	"errors"
	"flag"
	"os"
	"sync"
	"time"

	"github.com/cloudnativelabs/kube-router/v2/pkg/controllers/netpol"
	"github.com/cloudnativelabs/kube-router/v2/pkg/healthcheck"
	"github.com/cloudnativelabs/kube-router/v2/pkg/options"
	"github.com/cloudnativelabs/kube-router/v2/pkg/svcip"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
)

const (
	retryPeriod  = 200 * time.Millisecond
	startTimeout = time.Minute
)

func main() {
	kubeconfig := flag.String("kubeconfig", "", "file with the address of the API server and credentials")
	node := flag.String("node", "", "name of the node whose pods are protected")
	services := flag.String("services", "", "CIDR of the addresses of Services")
	ready := flag.String("ready", "", "file that is created once the first rules are in place")
	klog.InitFlags(nil)
	flag.Parse()
	if err := run(*kubeconfig, *node, *services, *ready); err != nil {
		klog.ErrorS(err, "policies can't be enforced", "node", *node)
		os.Exit(1)
	}
}

func run(kubeconfig, node, services, ready string) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	router := options.NewKubeRouterConfig()
	router.EnableIPv4, router.HostnameOverride, router.ClusterIPCIDRs = true, node, []string{services}
	ranges, err := svcip.NewValidator(svcip.Config{ClusterIPCIDRs: router.ClusterIPCIDRs, EnableIPv4: true})
	if err != nil {
		return err
	}

	stop := make(chan struct{})
	factory := informers.NewSharedInformerFactory(client, 0)
	pods := factory.Core().V1().Pods().Informer()
	namespaces := factory.Core().V1().Namespaces().Informer()
	policies := factory.Networking().V1().NetworkPolicies().Informer()
	factory.Start(stop)
	for kind, synced := range factory.WaitForCacheSync(stop) {
		if !synced {
			return errors.New("can't list " + kind.String())
		}
	}

	controller, err := whenRegistered(func() (*netpol.NetworkPolicyController, error) {
		tables, sets, err := netpol.NewIPTablesHandlers(router)
		if err != nil {
			return nil, err
		}
		return netpol.NewNetworkPolicyController(
			client, router, pods, policies, namespaces, &sync.Mutex{}, nil, tables, sets, ranges)
	})
	if err != nil {
		return err
	}
	for informer, handler := range map[cache.SharedIndexInformer]cache.ResourceEventHandler{
		pods:       controller.PodEventHandler,
		namespaces: controller.NamespaceEventHandler,
		policies:   controller.NetworkPolicyEventHandler,
	} {
		if _, err := informer.AddEventHandler(handler); err != nil {
			return err
		}
	}

	heartbeats := make(chan *healthcheck.ControllerHeartbeat, 10)
	var running sync.WaitGroup
	running.Add(1)
	go controller.Run(heartbeats, stop, &running)
	<-heartbeats // the first sync has begun
	controller.RequestFullSync()
	<-heartbeats // the second has begun, so the first has ended
	if err := os.WriteFile(ready, nil, 0o600); err != nil {
		return err
	}
	for range heartbeats { // the controller blocks if nobody reads them
	}
	return nil
}

// whenRegistered repeats create, which needs the node's object, while the kubelet registers the node.
func whenRegistered[T any](create func() (T, error)) (T, error) {
	for deadline := time.Now().Add(startTimeout); ; time.Sleep(retryPeriod) {
		made, err := create()
		if err == nil || time.Now().After(deadline) {
			return made, err
		}
		klog.V(1).InfoS("Waiting for the node", "reason", err)
	}
}
